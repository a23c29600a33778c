"""Files and folders: atomic writes, locks, digests, disks and buckets."""
