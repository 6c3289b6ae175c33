"""What an update costs and what it is worth: methods and codecs in one harness, over the fleet."""
