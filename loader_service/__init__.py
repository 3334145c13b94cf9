"""A distributed image-loading service: every sample exactly once, whatever dies."""
