// Package interop puts clients and servers of others on both sides of an edge:
// gRPC's own interoperability suite, WebSockets, command-line clients, and peers
// that stop in the middle of what they say. All of it looks at edges from
// outside, as processes.
package interop

import (
	"os"
	"testing"

	"github.com/reseal/reseal/integration/harness"
)

func TestMain(m *testing.M) {
	if name := os.Getenv(grpcCaseVariable); name != "" {
		os.Exit(grpcClient(name))
	}
	os.Exit(harness.Main(m))
}
