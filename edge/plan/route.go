package plan

import "slices"

// attachRoutes adds all Routes, in the order of their names, to the listeners
// that they name.
func (c *compiler) attachRoutes(listeners map[string]*listener) {
	for _, resource := range c.snapshot.Kind("Route") {
		spec := resource.GetRoute().WithDefaults()
		var served []*listener
		for _, name := range spec.Listeners {
			if l := listeners[name]; l != nil && !slices.Contains(served, l) {
				served = append(served, l)
			}
		}
		if len(served) == 0 {
			continue
		}
		c.guard(resource, func(o object) {
			target := newTarget(o.ref.Name, spec)
			for _, l := range served {
				l.router.add(spec, target)
			}
		})
	}
}
