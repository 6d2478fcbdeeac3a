package resealv1

import (
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// fullRetry is when an edge may try again that found no room.
const fullRetry = 30 * time.Second

// ErrTooManyEdges is a gRPC status: RESOURCE_EXHAUSTED, with a google.rpc.RetryInfo.
var ErrTooManyEdges = tooManyEdges()

func tooManyEdges() error {
	full := status.New(codes.ResourceExhausted, "this replica has as many edges as it can take")
	if detailed, err := full.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(fullRetry)}); err == nil {
		full = detailed
	}
	return full.Err()
}

// ViolationsError is the error of resources that are not valid.
type ViolationsError struct {
	// Violations are what is wrong, all of it. Not empty.
	Violations []*Violation
}

// Error names every violation, one a line.
func (e *ViolationsError) Error() string {
	lines := make([]string, len(e.Violations))
	for i, violation := range e.Violations {
		lines[i] = violation.Text()
	}
	return strings.Join(lines, "\n")
}

// Text is "Kind/name: path: description", without the parts that are empty.
func (v *Violation) Text() string {
	var parts []string
	if v.GetResource() != nil {
		parts = append(parts, v.GetResource().Key())
	}
	for _, part := range []string{v.GetField(), v.GetDescription()} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, ": ")
}
