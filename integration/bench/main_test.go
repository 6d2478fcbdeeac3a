package bench

import (
	"os"
	"testing"

	"github.com/reseal/reseal/integration/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
