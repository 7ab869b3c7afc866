"""Property tests that go on for as long as they are let: `make fuzz`, and test_fuzz.py for a minute in the suite."""
