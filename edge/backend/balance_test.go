package backend

import (
	"fmt"
	"net/http"
	"net/netip"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

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
