package rules

import (
	"net"
	"net/netip"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// addresses finds listeners that one edge can't serve side by side, because their
// addresses collide: the ports are equal and not 0, and the hosts are equal or one
// of them stands for all addresses of the edge.
//
// In a whole configuration such listeners are refused when every edge that the
// one selects is sure to be selected by the other too: when the labels of one
// selector are among those of the other. Selectors that need different labels, as
// {site: a} and {role: b}, may never meet on an edge. If they do, that edge
// refuses the listener whose name sorts last.
type addresses struct {
	selection bool // all listeners are of one edge
	byPort    map[string][]claim
}

type claim struct {
	name   string
	host   string
	labels map[string]string
}

func newAddresses(selection bool) *addresses {
	return &addresses{selection: selection, byPort: map[string][]claim{}}
}

// take notes a listener's address, or returns the name of a listener that has it.
func (a *addresses) take(listener *resealv1.Resource) (other string) {
	spec := listener.GetListener()
	host, port, err := net.SplitHostPort(spec.GetAddress())
	port = strings.TrimLeft(port, "0")
	if err != nil || port == "" {
		return "" // the first is a violation of its own, port 0 is a free one
	}
	next := claim{listener.GetMetadata().GetName(), canonicalHost(host), spec.GetEdgeSelector().GetMatchLabels()}
	for _, earlier := range a.byPort[port] {
		if hostsCollide(earlier.host, next.host) && (a.selection || sureToMeet(earlier.labels, next.labels)) {
			return earlier.name
		}
	}
	a.byPort[port] = append(a.byPort[port], next)
	return ""
}

// canonicalHost is "" for a host that stands for all addresses. Go listens on
// IPv4 and IPv6 for 0.0.0.0 as for [::].
func canonicalHost(host string) string {
	ip, err := netip.ParseAddr(host)
	switch {
	case err != nil:
		return strings.ToLower(host)
	case ip.Unmap().IsUnspecified():
		return ""
	}
	return ip.Unmap().String()
}

func hostsCollide(a, b string) bool { return a == b || a == "" || b == "" }

// sureToMeet says whether every edge that one of the selectors selects is selected
// by the other.
func sureToMeet(a, b map[string]string) bool {
	if len(a) > len(b) {
		a, b = b, a
	}
	for key, value := range a {
		if other, ok := b[key]; !ok || other != value {
			return false
		}
	}
	return true
}
