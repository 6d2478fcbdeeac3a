package plan

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

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
		o := c.object(resource)
		before := len(c.violations)
		o.checkRoute(spec, served)
		if len(c.violations) > before {
			continue
		}
		target := newTarget(o.ref.Name, spec)
		for _, listener := range served {
			listener.router.add(spec, target)
		}
	}
}

func (o object) checkRoute(spec *resealv1.Route, served []*Listener) {
	for i, host := range spec.Hosts {
		name := strings.TrimPrefix(host, "*.")
		if !validName(name) && !isIP(host) {
			o.refuse(fmt.Sprintf("spec.hosts[%d]", i), "%q is no host name in lower case without port, or such a name after \"*.\"", host)
		}
	}
	for i, match := range spec.Paths {
		o.checkPath(fmt.Sprintf("spec.paths[%d]", i), match)
	}
	var total uint64
	for i, pool := range spec.Pools {
		total += uint64(pool.GetWeight())
		for _, listener := range served {
			o.poolFor(fmt.Sprintf("spec.pools[%d].name", i), pool.GetName(), listener.Name, listener.Spec.Protocol)
		}
	}
	if total == 0 {
		o.refuse("spec.pools", "name at least one pool with a weight above 0")
	}
	for _, listener := range served {
		if listener.Spec.Protocol == resealv1.Listener_PROTOCOL_TLS && (len(spec.Paths) > 0 || spec.RequestHeaders != nil || spec.ResponseHeaders != nil) {
			o.refuse("spec.listeners", "Listener/%s has protocol tls, where paths and header edits mean nothing", listener.Name)
		}
	}
	o.checkEdits("spec.requestHeaders", spec.RequestHeaders)
	o.checkEdits("spec.responseHeaders", spec.ResponseHeaders)
	o.timeout("spec.timeouts.request", spec.GetTimeouts().GetRequest())
	o.timeout("spec.timeouts.responseHeader", spec.GetTimeouts().GetResponseHeader())
}

func (o object) checkPath(field string, match *resealv1.PathMatch) {
	switch path := match.GetMatch().(type) {
	case *resealv1.PathMatch_Prefix:
		if !strings.HasPrefix(path.Prefix, "/") {
			o.refuse(field+".prefix", "%q does not start with /", path.Prefix)
		}
	case *resealv1.PathMatch_Exact:
		if !strings.HasPrefix(path.Exact, "/") {
			o.refuse(field+".exact", "%q does not start with /", path.Exact)
		}
	default:
		o.refuse(field, "set prefix or exact")
	}
}

// connectionHeaders belong to one connection or frame the message: an edit of
// them would break it.
var connectionHeaders = []string{
	"connection", "content-length", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
}

func (o object) checkEdits(field string, edits *resealv1.HeaderEdits) {
	check := func(field, name string) {
		if !httpguts.ValidHeaderFieldName(name) {
			o.refuse(field, "%q is no header name", name)
		} else if slices.Contains(connectionHeaders, strings.ToLower(name)) {
			o.refuse(field, "%s belongs to the connection and can't be edited", name)
		}
	}
	values := func(field string, headers map[string]string) {
		for name, value := range headers {
			path := fmt.Sprintf("%s[%q]", field, name)
			check(path, name)
			if !httpguts.ValidHeaderFieldValue(value) {
				o.refuse(path, "the value is no header value")
			}
		}
	}
	values(field+".set", edits.GetSet())
	values(field+".add", edits.GetAdd())
	for i, name := range edits.GetRemove() {
		check(fmt.Sprintf("%s.remove[%d]", field, i), name)
	}
}
