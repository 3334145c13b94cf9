"""Use a trained network: evaluate it on a split, predict classes of pictures, export it."""
