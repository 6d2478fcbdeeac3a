// Package tickets tests that the sessions of clients survive what happens to a
// fleet: rotated keys, restarted edges, killed and unreachable control planes;
// and that they end where they must. All of it with real processes: each edge is
// a host of its own, in a network namespace, with the same listener.
package tickets

import (
	"os"
	"testing"

	"github.com/reseal/reseal/integration/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
