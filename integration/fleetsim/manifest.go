package fleetsim

import (
	"fmt"
	"strings"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// Size says how much configuration a fleet has.
type Size struct {
	// Pools, Listeners (each with a certificate of its own) and Routes.
	Pools, Listeners, Routes int
}

// The sizes of the table: the least that an edge can serve, and what is usual for
// edges in front of many services.
var (
	Small     = Size{Pools: 1, Listeners: 1, Routes: 1}
	Realistic = Size{Pools: 200, Listeners: 50, Routes: 200}
)

// atOnce has changes go to all edges at once: how long they take is what is measured.
const atOnce = `---
apiVersion: reseal/v1
kind: RolloutPolicy
metadata: {name: default}
spec: {stages: [{percent: 100}]}
`

// Manifest is a configuration of a size, of which changes go to all edges at once.
func (s Size) Manifest(authority *peers.Authority) (string, error) {
	var text strings.Builder
	text.WriteString(atOnce)
	for i := range s.Pools {
		text.WriteString(s.Pool(authority, i, 0))
	}
	for i := range s.Listeners {
		pair, err := authority.Issue(fmt.Sprintf("site%d.test", i))
		if err != nil {
			return "", err
		}
		text.WriteString(harness.Certificate(fmt.Sprintf("site-%d", i), pair))
		fmt.Fprintf(&text, `---
apiVersion: reseal/v1
kind: Listener
metadata: {name: %s}
spec:
  address: 127.0.0.1:%d
  certificates: [site-%d]
`, listenerName(i), 10000+i, i)
	}
	for i := range s.Routes {
		text.WriteString(harness.Route(fmt.Sprintf("route-%d", i), listenerName(i%s.Listeners), fmt.Sprintf("host%d.test", i), poolName(i%s.Pools), ""))
	}
	return text.String(), nil
}

// Pool is the manifest of one of the pools. Another version has other endpoints.
func (s Size) Pool(authority *peers.Authority, i, version int) string {
	return fmt.Sprintf(`---
apiVersion: reseal/v1
kind: BackendPool
metadata: {name: %s}
spec:
  endpoints:
    - {address: "backend-%d-%d.test:8443"}
    - {address: "spare-%d.test:8443"}
  tls:
    serverName: backend.test
    trust:
      caPem: |
%s
`, poolName(i), i, version, i, harness.Indent(authority.PEM(), 8))
}

func poolName(i int) string { return fmt.Sprintf("pool-%d", i) }

func listenerName(i int) string { return fmt.Sprintf("listener-%d", i) }
