"""What can be said of a restoration without its clean image: alarm, retention, abstention, confidence."""
