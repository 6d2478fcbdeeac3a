// Package integration tests Reseal end to end: real processes of this
// repository between real clients and real backends.
package integration

import (
	"os"
	"testing"

	"github.com/reseal/reseal/integration/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// world is a site under test.
type world struct {
	*harness.Site
	t *testing.T
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOf(t, harness.New(t))
}

func newWorldOf(t *testing.T, fleet *harness.Fleet) *world {
	t.Helper()
	return &world{Site: harness.NewSite(fleet), t: t}
}
