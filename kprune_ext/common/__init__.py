"""Ground floor of both packages: files, processes, devices, text. Knows neither of them."""
