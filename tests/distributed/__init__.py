"""What two processes do, and the tests that start them."""
