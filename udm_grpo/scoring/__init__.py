"""Scores of pictures: the trainer's side of the bridge, and folders of pictures with their scores."""
