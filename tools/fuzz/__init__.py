"""`make fuzz`: damaged messages and JPEGs for the decoders and for a running node, at random and guided by coverage."""
