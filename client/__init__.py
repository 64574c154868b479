"""Clients of Jobwire. They know the service by its wire contract alone and import nothing of it."""
