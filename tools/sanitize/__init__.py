"""`make sanitize`: the extensions under address and undefined-behaviour sanitizers; and other builds of them for tests."""
