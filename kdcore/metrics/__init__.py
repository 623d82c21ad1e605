"""The quantities themselves, shared by losses and evaluation."""
