"""Records, and the pure function that makes a slice of augmented images from them. Nothing here uses the network."""
