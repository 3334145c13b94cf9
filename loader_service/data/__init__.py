"""From a record to a slice of augmented images, as a pure function. Knows no network."""
