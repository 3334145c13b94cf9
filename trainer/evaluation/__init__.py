"""Evaluation of a trained network on a split, prediction of classes of images, and export."""
