package balance

import (
	"cmp"
	"hash/fnv"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

// ring is a consistent-hash ring. An endpoint that comes or goes moves only the
// keys that it gains or held.
type ring struct {
	points    []ringPoint // by hash
	endpoints []*Endpoint // each one that has a point
}

type ringPoint struct {
	hash uint64
	e    *Endpoint
}

const (
	pointsPerWeight = 128
	maxRingPoints   = 1 << 16
)

// newRing places each member by its weight. With many or heavy members the
// number of points per weight shrinks, but each member keeps at least one.
func newRing(members []*member) *ring {
	total := 0
	for _, m := range members {
		total += m.weight
	}
	per := pointsPerWeight
	if total > 0 && total*per > maxRingPoints {
		per = maxRingPoints / total
	}
	r := &ring{}
	for _, m := range members {
		if m.weight == 0 {
			continue
		}
		r.endpoints = append(r.endpoints, m.Endpoint)
		for i := range max(per*m.weight, 1) {
			r.points = append(r.points, ringPoint{hashString(m.Address + "#" + strconv.Itoa(i)), m.Endpoint})
		}
	}
	slices.SortFunc(r.points, func(a, b ringPoint) int {
		if c := cmp.Compare(a.hash, b.hash); c != 0 {
			return c
		}
		return strings.Compare(a.e.Address, b.e.Address)
	})
	return r
}

// manyRefused is after how many endpoints that are not ok a walk makes sure that
// there is one: otherwise it would visit all points in vain.
const manyRefused = 8

// find walks from the key's place to the first endpoint that is ok.
func (r *ring) find(key uint64, ok func(*Endpoint) bool) *Endpoint {
	start, _ := slices.BinarySearchFunc(r.points, key, func(p ringPoint, key uint64) int {
		return cmp.Compare(p.hash, key)
	})
	var refused *Endpoint
	many := 0
	for i := range r.points {
		e := r.points[(start+i)%len(r.points)].e
		if e == refused {
			continue
		}
		if ok(e) {
			return e
		}
		refused = e
		if many++; many == manyRefused && !slices.ContainsFunc(r.endpoints, ok) {
			return nil
		}
	}
	return nil
}

// hashSource is what of a request is hashed.
type hashSource struct {
	kind string // "source_ip", "host", "path", "header" or "cookie"
	name string
}

func parseHashSource(hashOn string) hashSource {
	kind, name, _ := strings.Cut(hashOn, ":")
	switch kind {
	case "host", "path", "header", "cookie":
		return hashSource{kind, name}
	default:
		return hashSource{kind: "source_ip"}
	}
}

// of returns the hash of an exchange's key. A request without the header or cookie
// is hashed by its source.
func (s hashSource) of(x *exchange.Exchange, req *exchange.Request) uint64 {
	key := ""
	if req != nil {
		switch s.kind {
		case "host":
			key = req.Authority
		case "path":
			key = pathOf(req.Target)
		case "header":
			key = req.Fields.Get(s.name)
		case "cookie":
			key = cookie(req.Fields, s.name)
		}
	}
	if key == "" {
		key = x.Source.Addr().String()
	}
	return hashString(key)
}

// pathOf is the decoded path of a request target.
func pathOf(target string) string {
	path, _, _ := strings.Cut(target, "?")
	if decoded, err := url.PathUnescape(path); err == nil {
		return decoded
	}
	return path
}

// cookie is the value of a cookie, or "" (RFC 6265 section 4.2).
func cookie(fields exchange.Fields, name string) string {
	for line := range fields.Values("Cookie") {
		for pair := range strings.SplitSeq(line, ";") {
			if key, value, ok := strings.Cut(exchange.TrimSpace(pair), "="); ok && key == name {
				return strings.Trim(value, `"`)
			}
		}
	}
	return ""
}

// hashString is FNV-1a with a finalizer, since FNV alone leaves the high bits
// of similar short strings alike.
func hashString(s string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(s))
	x := h.Sum64()
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}
