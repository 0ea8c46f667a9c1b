"""Networks, prior, model files and the runtime that puts them on a device."""
