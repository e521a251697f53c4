"""The on-disk format of an activation store: what determines it, its layout, data types and codecs."""
