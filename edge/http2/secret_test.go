package http2

import (
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/exchange"
)

// An error is logged and shown: it tells nothing of a query.
func TestErrorsWithoutQuery(t *testing.T) {
	err := checkRequest(&exchange.Request{Method: "GET", Scheme: "https", Authority: "a.test", Target: "/no way?token=hush"})
	if err == nil || strings.Contains(err.Error(), "hush") || !strings.Contains(err.Error(), "/no way") {
		t.Errorf("got %v", err)
	}
}
