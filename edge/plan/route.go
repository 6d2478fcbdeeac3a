package plan

import "slices"

// attachRoutes adds all Routes, in the order of their names, to the listeners
// that they name.
func (c *compiler) attachRoutes(listeners map[string]*Listener) {
	for _, resource := range c.snapshot.Kind("Route") {
		spec := resource.GetRoute().WithDefaults()
		var served []*Listener
		for _, name := range spec.Listeners {
			if listener := listeners[name]; listener != nil && !slices.Contains(served, listener) {
				served = append(served, listener)
			}
		}
		if len(served) == 0 {
			continue
		}
		c.guard(resource, func(o object) {
			target := newTarget(o.ref.Name, spec)
			for _, listener := range served {
				listener.router.add(spec, target)
			}
		})
	}
}
