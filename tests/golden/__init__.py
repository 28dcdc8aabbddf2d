"""What must not change without being noticed: numbers from revision to revision, and names that scripts rely on."""
