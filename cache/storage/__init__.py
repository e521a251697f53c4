"""Where stores lie: local folders, S3, HTTP and other URLs; serving them to others."""
