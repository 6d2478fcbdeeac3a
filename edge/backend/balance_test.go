package backend

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func members(weights ...int) []*member {
	var all []*member
	for i, w := range weights {
		all = append(all, &member{endpoint: &endpoint{address: fmt.Sprintf("10.0.0.%d:443", i)}, weight: w})
	}
	return all
}

func anyEndpoint(*endpoint) bool { return true }

func TestRoundRobinIsSmooth(t *testing.T) {
	p, m := &pool{}, members(5, 1, 1, 0)
	var order strings.Builder
	for range 7 {
		order.WriteString(p.rotate(m, anyEndpoint).address[7:8])
	}
	if order.String() != "0010200" {
		t.Errorf("order %s", order.String())
	}
}

func TestLeastRequest(t *testing.T) {
	m := members(1, 2, 4, 0)
	counts := map[string]int{}
	for range 70 {
		e := leastLoaded(m, anyEndpoint)
		e.inFlight.Add(1)
		counts[e.address]++
	}
	if counts["10.0.0.0:443"] != 10 || counts["10.0.0.1:443"] != 20 || counts["10.0.0.2:443"] != 40 {
		t.Errorf("70 requests went %v", counts)
	}
}

func TestRingMovesFewKeys(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(2, 12).Draw(rt, "endpoints")
		m := members(slices.Repeat([]int{1}, n)...)
		gone := m[rapid.IntRange(0, n-1).Draw(rt, "gone")]
		before := newRing(m)
		after := newRing(slices.DeleteFunc(slices.Clone(m), func(x *member) bool { return x == gone }))
		held := 0
		const keys = 500
		for i := range keys {
			key := hashString(fmt.Sprint("key", i))
			was, is := before.find(key, anyEndpoint), after.find(key, anyEndpoint)
			if was == gone.endpoint {
				held++
			} else if was != is {
				rt.Fatalf("a key moved from %s to %s", was.address, is.address)
			}
		}
		if held > 3*keys/n {
			rt.Fatalf("one of %d endpoints held %d of %d keys", n, held, keys)
		}
	})
}

func TestRingHash(t *testing.T) {
	a, b := serve(t, site()), serve(t, site())
	x := newBench(t, []string{a.addr, b.addr})
	endpointOf := func(hashOn string, change func(*http.Request, *exchange.Exchange)) string {
		x.set(func(p *resealv1.BackendPool) {
			p.LoadBalancing = &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_RING_HASH, HashOn: hashOn}
		})
		req, call := newRequest(t, "GET", "/bytes/1", nil), newCall()
		change(req, call)
		x.do(req, call)
		return call.Endpoint
	}
	for hashOn, set := range map[string]func(r *http.Request, c *exchange.Exchange, v string){
		"source_ip": func(_ *http.Request, c *exchange.Exchange, v string) {
			c.Source = netip.MustParseAddrPort("192.0.2." + v + ":1")
		},
		"path":        func(r *http.Request, _ *exchange.Exchange, v string) { r.URL.Path = "/bytes/" + v },
		"host":        func(r *http.Request, _ *exchange.Exchange, v string) { r.Host = v + ".test" },
		"header:X-Id": func(r *http.Request, _ *exchange.Exchange, v string) { r.Header.Set("X-Id", v) },
		"cookie:id":   func(r *http.Request, _ *exchange.Exchange, v string) { r.AddCookie(&http.Cookie{Name: "id", Value: v}) },
	} {
		t.Run(hashOn, func(t *testing.T) {
			used := map[string]bool{}
			for v := range 16 {
				value := fmt.Sprint(v)
				first := endpointOf(hashOn, func(r *http.Request, c *exchange.Exchange) { set(r, c, value) })
				used[first] = true
				if again := endpointOf(hashOn, func(r *http.Request, c *exchange.Exchange) { set(r, c, value) }); again != first {
					t.Fatalf("%s went to %s, then %s", value, first, again)
				}
			}
			if len(used) != 2 {
				t.Errorf("16 keys used %d of 2 endpoints", len(used))
			}
		})
	}
}

// A pick from a ring whose endpoints are all down looks at each of them, not at
// each of their points.
func TestRingOfDownEndpoints(t *testing.T) {
	m := members(slices.Repeat([]int{1}, 200)...)
	r := newRing(m)
	for key := range uint64(20) {
		asked := 0
		if e := r.find(key<<59, func(*endpoint) bool { asked++; return false }); e != nil {
			t.Fatal("an endpoint that is down was found")
		}
		if asked > 2*len(m) {
			t.Fatalf("%d questions for %d endpoints", asked, len(m))
		}
	}
	// The one that is up is found from everywhere.
	for key := range uint64(20) {
		if e := r.find(key<<59, func(e *endpoint) bool { return e == m[7].endpoint }); e != m[7].endpoint {
			t.Fatal("the endpoint that is up was missed")
		}
	}
}

func BenchmarkRingPick(b *testing.B) {
	for _, down := range []bool{false, true} {
		for _, n := range []int{10, 1000} {
			b.Run(fmt.Sprintf("endpoints=%d/down=%v", n, down), func(b *testing.B) {
				p, state := &pool{}, &poolState{settings: &settings{
					algorithm: resealv1.LoadBalancing_ALGORITHM_RING_HASH, question: &checkQuestion{},
				}}
				state.members = members(slices.Repeat([]int{1}, n)...)
				state.ring = newRing(state.members)
				if down {
					for _, m := range state.members {
						m.sick.Store(state.settings.question)
					}
				}
				call := &exchange.Exchange{Source: netip.MustParseAddrPort("192.0.2.1:1000")}
				for b.Loop() {
					if p.pick(state, call, nil, nil) == nil {
						b.Fatal("no endpoint")
					}
				}
			})
		}
	}
}
