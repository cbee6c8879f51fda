"""Attribution methods: one module each, all of one function type, from model and data to scores."""
