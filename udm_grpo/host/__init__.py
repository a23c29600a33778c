"""The rim: files, processes and the network."""
