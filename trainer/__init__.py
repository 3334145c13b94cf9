"""The two-tower AlexNet of Krizhevsky, Sutskever and Hinton (2012), and everything needed to train it."""
