"""What crosses the wire. Imports nothing of the service but `service.job`."""
