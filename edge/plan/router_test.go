package plan

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestNormalizeHost(t *testing.T) {
	for in, want := range map[string]string{
		"example.com": "example.com", "Example.COM": "example.com", "example.com:443": "example.com",
		"example.com.": "example.com", "Example.com.:8443": "example.com",
		"10.0.0.1:80": "10.0.0.1", "[::1]:443": "::1", "[::1]": "::1", "::1": "::1", "[2001:DB8:0:0::1]": "2001:db8::1",
		"": "", ":443": "", "[::1": "", "[::1]x": "", "[example.com]": "", "a:b:c": "",
	} {
		if got := NormalizeHost(in); got != want {
			t.Errorf("NormalizeHost(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzNormalizeHost(f *testing.F) {
	f.Add("Example.com.:443")
	f.Add("[::1]:80")
	f.Fuzz(func(t *testing.T, host string) {
		once := NormalizeHost(host)
		if strings.ContainsAny(once, "[]ABCDEFGHIJKLMNOPQRSTUVWXYZ") {
			t.Errorf("%q became %q", host, once)
		}
		if twice := NormalizeHost(once); twice != once && !strings.HasSuffix(once, ".") {
			t.Errorf("%q became %q, then %q", host, once, twice)
		}
	})
}

func TestRouter(t *testing.T) {
	r := routerOf([]namedRoute{
		{"a-first", route([]string{"app.test"}, []*resealv1.PathMatch{prefix("/api/")})},
		{"b-second", route([]string{"app.test"}, []*resealv1.PathMatch{prefix("/api")})},
		{"deep", route([]string{"app.test"}, []*resealv1.PathMatch{prefix("/api/v1/users"), exact("/api/exact")})},
		{"wild", route([]string{"*.app.test"}, nil)},
		{"wilder", route([]string{"*.test"}, []*resealv1.PathMatch{prefix("/only")})},
		{"any", route(nil, []*resealv1.PathMatch{prefix("/")})},
	})
	for _, test := range []struct{ host, path, want string }{
		{"app.test", "/api", "a-first"}, {"app.test", "/api/", "a-first"}, {"app.test", "/api/v1", "a-first"},
		{"app.test", "/api/v1/users/7", "deep"}, {"app.test", "/api/v1/users2", "a-first"},
		{"app.test", "/api/exact", "deep"}, {"app.test", "/api/exact/", "a-first"},
		{"app.test", "/apis", "any"}, {"app.test", "/only/x", "wilder"},
		{"x.app.test", "/only", "wild"}, {"x.y.app.test", "/", "wild"},
		{"y.test", "/only", "wilder"}, {"y.test", "/", "any"}, {"test", "/only", "any"}, {"", "/", "any"},
	} {
		if got, _ := r.route(test.host, test.path); got.Route != test.want {
			t.Errorf("%s%s goes to %q, want %q", test.host, test.path, got.Route, test.want)
		}
	}
}

func TestWeights(t *testing.T) {
	zero, three := uint32(0), uint32(3)
	target := newTarget("r", (&resealv1.Route{Pools: []*resealv1.WeightedPool{
		{Name: "off", Weight: &zero}, {Name: "one"}, {Name: "three", Weight: &three},
	}}).WithDefaults())
	counts := map[string]int{}
	for range 40_000 {
		counts[target.choose().Pool]++
	}
	// 10,000 expected, with a standard deviation of 87.
	if counts["off"] != 0 || counts["one"] < 9_000 || counts["one"] > 11_000 || counts["one"]+counts["three"] != 40_000 {
		t.Errorf("choices %v", counts)
	}
}

func TestRouteDoesNotAllocate(t *testing.T) {
	r := routerOf([]namedRoute{
		{"a", route([]string{"app.test"}, []*resealv1.PathMatch{prefix("/api"), exact("/x")})},
		{"b", route([]string{"*.app.test"}, nil)},
		{"c", route(nil, []*resealv1.PathMatch{prefix("/deep/er")})},
	})
	r.fallback = "web"
	if allocs := testing.AllocsPerRun(100, func() {
		r.route("app.test", "/api/v1/users/7")
		r.route("a.b.c.app.test", "/")
		r.route("nothing.example", "/deep/er/path")
		r.route("nothing.example", "/none")
	}); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

type namedRoute struct {
	name string
	spec *resealv1.Route
}

func route(hosts []string, paths []*resealv1.PathMatch) *resealv1.Route {
	return (&resealv1.Route{Hosts: hosts, Paths: paths, Pools: pools("p")}).WithDefaults()
}

func routerOf(routes []namedRoute) *router {
	r := newRouter("")
	for _, n := range routes {
		r.add(n.spec, newTarget(n.name, n.spec))
	}
	return r
}

// naive finds the route as the .proto words it: all that match, the best first.
func naive(routes []namedRoute, host, path string) string {
	type candidate struct {
		name       string
		host, path [2]int
	}
	var best []candidate
	for _, n := range routes {
		hosts := n.spec.Hosts
		if len(hosts) == 0 {
			hosts = []string{""}
		}
		for _, h := range hosts {
			var hostRank [2]int
			switch {
			case h == "":
			case strings.HasPrefix(h, "*"):
				if !strings.HasSuffix(host, h[1:]) || len(host) == len(h[1:]) {
					continue
				}
				hostRank = [2]int{1, len(h)}
			case h == host:
				hostRank = [2]int{2, 0}
			default:
				continue
			}
			if len(n.spec.Paths) == 0 {
				best = append(best, candidate{n.name, hostRank, [2]int{}})
			}
			for _, p := range n.spec.Paths {
				if e := p.GetExact(); e != "" && e == path {
					best = append(best, candidate{n.name, hostRank, [2]int{2, 0}})
				}
				if p.GetPrefix() == "" {
					continue
				}
				trimmed := strings.TrimRight(p.GetPrefix(), "/")
				if path == trimmed || strings.HasPrefix(path, trimmed+"/") {
					best = append(best, candidate{n.name, hostRank, [2]int{1, len(trimmed)}})
				}
			}
		}
	}
	if len(best) == 0 {
		return ""
	}
	slices.SortStableFunc(best, func(a, b candidate) int {
		for _, c := range []int{slices.Compare(b.host[:], a.host[:]), slices.Compare(b.path[:], a.path[:]), strings.Compare(a.name, b.name)} {
			if c != 0 {
				return c
			}
		}
		return 0
	})
	return best[0].name
}

func TestRouterEqualsModel(t *testing.T) {
	label := rapid.SampledFrom([]string{"a", "b", "test"})
	host := rapid.Custom(func(t *rapid.T) string {
		return strings.Join(rapid.SliceOfN(label, 1, 4).Draw(t, "labels"), ".")
	})
	path := rapid.Custom(func(t *rapid.T) string {
		p := "/" + strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "ab"}), 0, 4).Draw(t, "segments"), "/")
		if rapid.Bool().Draw(t, "slash") && p != "/" {
			p += "/"
		}
		return p
	})
	rapid.Check(t, func(t *rapid.T) {
		var routes []namedRoute
		for i := range rapid.IntRange(0, 6).Draw(t, "routes") {
			var hosts []string
			for range rapid.IntRange(0, 3).Draw(t, "hosts") {
				h := host.Draw(t, "host")
				if rapid.Bool().Draw(t, "wildcard") {
					h = "*." + h
				}
				hosts = append(hosts, h)
			}
			var paths []*resealv1.PathMatch
			for range rapid.IntRange(0, 3).Draw(t, "paths") {
				p := prefix(path.Draw(t, "path"))
				if rapid.Bool().Draw(t, "exact") {
					p = exact(p.GetPrefix())
				}
				paths = append(paths, p)
			}
			routes = append(routes, namedRoute{fmt.Sprint("r", i), route(hosts, paths)})
		}
		r := routerOf(routes)
		for range 20 {
			h, p := host.Draw(t, "request host"), path.Draw(t, "request path")
			got, ok := r.route(h, p)
			if want := naive(routes, h, p); got.Route != want || ok != (want != "") {
				t.Fatalf("%s%s goes to %q, want %q", h, p, got.Route, want)
			}
			matches := slices.ContainsFunc(routes, func(n namedRoute) bool {
				return slices.ContainsFunc(n.spec.Hosts, func(pattern string) bool {
					return pattern == h || strings.HasPrefix(pattern, "*") && strings.HasSuffix(h, pattern[1:])
				})
			})
			if r.names(h) != matches {
				t.Fatalf("names(%q) is not %v", h, matches)
			}
		}
	})
}
