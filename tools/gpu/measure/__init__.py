"""The measurements and checks of ``make gpu``, one file for each part, and what they share: data, forms, turns."""
