package bench

import (
	"fmt"

	"github.com/reseal/reseal/integration/harness"
)

// siteName is the name that clients ask for unless a scenario has several.
const siteName = harness.SiteName

// siteNames are in the certificate that clients see.
var siteNames = []string{siteName, "*." + siteName}

// hostNames are n names of the site.
func hostNames(n int) []string {
	if n <= 1 {
		return []string{siteName}
	}
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("host%d.%s", i+1, siteName)
	}
	return names
}

// listenerManifest is a listener of one edge, whose label "edge" is its id.
func listenerManifest(name, address, edge, certificate, pool string) string {
	return fmt.Sprintf(`---
apiVersion: reseal/v1
kind: Listener
metadata: {name: %s}
spec:
  address: %s
  edgeSelector: {matchLabels: {edge: %s}}
  certificates: [%s]
  pool: %s
`, name, address, edge, certificate, pool)
}

// patience is for a backend that has just started and shares two cores with all
// the others: its first handshake may take longer than the default of 2 s for
// which others wait for its session.
const patience = "coalesceTimeout: 15s"

// poolManifest is the scenario's pool. Without serverName it follows the
// request's host. sessions are further fields of spec.sessions,
// more further lines of the spec.
func poolManifest(name, endpoint, serverName string, authority []byte, sessions, more string) string {
	if sessions != "" {
		sessions = ", " + sessions
	}
	if serverName != "" {
		serverName = "serverName: " + serverName
	}
	return fmt.Sprintf(`---
apiVersion: reseal/v1
kind: BackendPool
metadata: {name: %s}
spec:
  endpoints:
    - {address: %q}
  tls:
    %s
    trust:
      caPem: |
%s
  sessions: {%s%s}
  timeouts: {handshake: 20s}
%s`, name, endpoint, serverName, harness.Indent(authority, 8), patience, sessions, more)
}
