package plan

import (
	"math/rand/v2"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"github.com/reseal/reseal/proto/rules"
)

// router finds the route of a request. Of the routes that match, the most
// specific host wins (exact, then the longest wildcard, then none), then the
// most specific path (exact, then the longest prefix, then none), then the one
// that was added first.
type router struct {
	exact    map[string]*paths
	wildcard map[string]*paths // by ".suffix" of "*.suffix"
	anyHost  *paths
	fallback string // the listener's pool, or ""
}

// paths are the routes of one host.
type paths struct {
	exact   map[string]*target
	prefix  map[string]*target // without trailing slashes, so "" for "/"
	anyPath *target
}

// target is the far end of a route.
type target struct {
	match exchange.Match
	// pools are the choices with a weight above 0, when there are several.
	pools []weighted
	total uint64
}

type weighted struct {
	name  string
	below uint64 // sum of the weights up to and including this one
}

func newRouter(fallback string) *router {
	return &router{exact: map[string]*paths{}, wildcard: map[string]*paths{}, fallback: fallback}
}

func newTarget(name string, spec *resealv1.Route) *target {
	t := &target{match: exchange.Match{
		Route:                 name,
		RequestHeaders:        spec.RequestHeaders,
		ResponseHeaders:       spec.ResponseHeaders,
		RequestTimeout:        duration(spec.GetTimeouts().GetRequest()),
		ResponseHeaderTimeout: duration(spec.GetTimeouts().GetResponseHeader()),
	}}
	for _, pool := range spec.Pools {
		if pool.GetWeight() == 0 {
			continue
		}
		t.total += uint64(pool.GetWeight())
		t.pools = append(t.pools, weighted{name: pool.GetName(), below: t.total})
	}
	if len(t.pools) == 1 {
		t.match.Pool = t.pools[0].name
		t.pools = nil
	}
	return t
}

// add adds a route. Routes that were added before win a tie.
func (r *router) add(spec *resealv1.Route, t *target) {
	if len(spec.Hosts) == 0 {
		if r.anyHost == nil {
			r.anyHost = newPaths()
		}
		r.anyHost.add(spec.Paths, t)
	}
	for _, host := range spec.Hosts {
		hosts, key := r.exact, NormalizeHost(host)
		if suffix, ok := strings.CutPrefix(host, "*"); ok {
			hosts, key = r.wildcard, suffix
		}
		if hosts[key] == nil {
			hosts[key] = newPaths()
		}
		hosts[key].add(spec.Paths, t)
	}
}

// route finds where a request goes, as exchange.Listener.Route. It does not
// allocate.
func (r *router) route(host, path string) (exchange.Match, bool) {
	if p := r.exact[host]; p != nil {
		if t := p.find(path); t != nil {
			return t.choose(), true
		}
	}
	if len(r.wildcard) > 0 {
		for suffix := parent(host); suffix != ""; suffix = parent(suffix[1:]) {
			if p := r.wildcard[suffix]; p != nil {
				if t := p.find(path); t != nil {
					return t.choose(), true
				}
			}
		}
	}
	if r.anyHost != nil {
		if t := r.anyHost.find(path); t != nil {
			return t.choose(), true
		}
	}
	return exchange.Match{Pool: r.fallback}, r.fallback != ""
}

// names reports whether a route names host.
func (r *router) names(host string) bool {
	if r.exact[host] != nil {
		return true
	}
	for suffix := parent(host); suffix != ""; suffix = parent(suffix[1:]) {
		if r.wildcard[suffix] != nil {
			return true
		}
	}
	return false
}

// parent is host from its first dot on, or "" when no label stands before it.
func parent(host string) string {
	if dot := strings.IndexByte(host, '.'); dot > 0 {
		return host[dot:]
	}
	return ""
}

func newPaths() *paths {
	return &paths{exact: map[string]*target{}, prefix: map[string]*target{}}
}

func (p *paths) add(matches []*resealv1.PathMatch, t *target) {
	if len(matches) == 0 && p.anyPath == nil {
		p.anyPath = t
	}
	for _, match := range matches {
		byPath, key := p.exact, match.GetExact()
		_, prefix := match.GetMatch().(*resealv1.PathMatch_Prefix)
		if prefix {
			byPath, key = p.prefix, match.GetPrefix()
		}
		key, _, _ = rules.RoutePath(key) // checkPath has seen to errors
		if prefix {
			key = strings.TrimRight(key, "/")
		}
		to := t
		if strings.Contains(key, "%2F") || strings.Contains(key, "%5C") {
			named := *t
			to = &named
			to.match.EncodedSeparator = true
		}
		if byPath[key] == nil {
			byPath[key] = to
		}
	}
}

func (p *paths) find(path string) *target {
	if t := p.exact[path]; t != nil {
		return t
	}
	if len(p.prefix) > 0 {
		for rest := path; ; {
			if t := p.prefix[rest]; t != nil {
				return t
			}
			slash := strings.LastIndexByte(rest, '/')
			if slash < 0 {
				break
			}
			rest = rest[:slash]
		}
	}
	return p.anyPath
}

// choose makes the weighted choice.
func (t *target) choose() exchange.Match {
	match := t.match
	if t.pools == nil {
		return match
	}
	at := rand.Uint64N(t.total)
	for i := range t.pools {
		if at < t.pools[i].below {
			match.Pool = t.pools[i].name
			break
		}
	}
	return match
}
