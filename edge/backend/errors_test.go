package backend

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/reseal/reseal/edge/conn"
)

func TestRefusedRenegotiation(t *testing.T) {
	for _, cause := range []error{conn.ErrRenegotiation, conn.ErrRenegotiatedAgain} {
		err := fmt.Errorf("%w: read", cause)
		e := refusedRenegotiation(&lostError{err: err, written: true})
		if e == nil || e.Reason != ReasonProtocolError || ofEndpoint(e) || !strings.Contains(e.Error(), "tls.renegotiation: once") {
			t.Errorf("%v: %v", cause, e)
		}
		if refusedRenegotiation(&lostError{err: err}) != nil {
			t.Error("a request that was not sent can't be tried again")
		}
	}
	if err := refusedRenegotiation(net.ErrClosed); err != nil {
		t.Error(err)
	}
}
