"""What every evaluation shares: targets, results, their files, and when they are made anew."""
