"""HTTP: the routes, who may call them and how often, what every answer and error says."""
