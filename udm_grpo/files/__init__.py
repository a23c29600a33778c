"""Files and folders: written whole, locked, digested, on disks and in buckets."""
