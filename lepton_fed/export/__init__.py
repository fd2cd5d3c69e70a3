"""From a trained model to a signed bundle that a site can verify and use."""
