"""The Dynamo backend and its graph passes, one file each."""
