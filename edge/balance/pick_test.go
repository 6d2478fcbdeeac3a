package balance

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func members(weights ...int) []*member {
	var all []*member
	for i, w := range weights {
		all = append(all, &member{Endpoint: &Endpoint{Address: fmt.Sprintf("10.0.0.%d:443", i)}, weight: w})
	}
	return all
}

func anyEndpoint(*Endpoint) bool { return true }

func TestRoundRobinIsSmooth(t *testing.T) {
	v := &View{members: members(5, 1, 1, 0)}
	var order strings.Builder
	for range 7 {
		order.WriteString(v.rotate(anyEndpoint).Address[7:8])
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
		e.Begin()
		counts[e.Address]++
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
			if was == gone.Endpoint {
				held++
			} else if was != is {
				rt.Fatalf("a key moved from %s to %s", was.Address, is.Address)
			}
		}
		if held > 3*keys/n {
			rt.Fatalf("one of %d endpoints held %d of %d keys", n, held, keys)
		}
	})
}

// A pick from a ring whose endpoints are all down looks at each of them, not at
// each of their points.
func TestRingOfDownEndpoints(t *testing.T) {
	m := members(slices.Repeat([]int{1}, 200)...)
	r := newRing(m)
	for key := range uint64(20) {
		asked := 0
		if e := r.find(key<<59, func(*Endpoint) bool { asked++; return false }); e != nil {
			t.Fatal("an endpoint that is down was found")
		}
		if asked > 2*len(m) {
			t.Fatalf("%d questions for %d endpoints", asked, len(m))
		}
	}
	// The one that is up is found from everywhere.
	for key := range uint64(20) {
		if e := r.find(key<<59, func(e *Endpoint) bool { return e == m[7].Endpoint }); e != m[7].Endpoint {
			t.Fatal("the endpoint that is up was missed")
		}
	}
}

func BenchmarkRingPick(b *testing.B) {
	for _, down := range []bool{false, true} {
		for _, n := range []int{10, 1000} {
			b.Run(fmt.Sprintf("endpoints=%d/down=%v", n, down), func(b *testing.B) {
				v := &View{
					rules:   &Rules{algorithm: resealv1.LoadBalancing_ALGORITHM_RING_HASH, question: &question{}},
					members: members(slices.Repeat([]int{1}, n)...),
				}
				v.ring = newRing(v.members)
				if down {
					for _, m := range v.members {
						m.sick.Store(v.rules.question)
					}
				}
				x := &exchange.Exchange{Source: netip.MustParseAddrPort("192.0.2.1:1000")}
				for b.Loop() {
					if v.Pick(x, nil, nil) == nil {
						b.Fatal("no endpoint")
					}
				}
			})
		}
	}
}
