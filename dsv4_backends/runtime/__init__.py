"""From a choice to a call: binding, dispatch, steps, and what is done before serving."""
