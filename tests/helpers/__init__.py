"""What tests of several folders share: tiny models, processes, a Hub, pictures, and commands called as a user would."""
