"""The autoscaling endpoint: an HTTP ingress, replicas that hold a published model, and a client."""
