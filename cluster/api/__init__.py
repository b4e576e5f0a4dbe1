"""The operator's HTTP face without Ray: `create_api` over a `Source`, its guard, its page."""
