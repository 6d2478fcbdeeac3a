package admin

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	// errorDomain is the domain of google.rpc.ErrorInfo.
	errorDomain = "reseal"
	// reasonConflict is the reason in the google.rpc.ErrorInfo of a conflict.
	reasonConflict = "REVISION_CONFLICT"
	// maxViolations bounds the violations in one status: details travel in a
	// header, of which gRPC takes 16 MiB and proxies much less.
	maxViolations = 500
	// maxDescription bounds the bytes of one of them.
	maxDescription = 1024
)

// status is the gRPC status of an error. This is the only place where one is
// made. It is never Unknown.
func (s *server) status(ctx context.Context, method string, err error) error {
	var violations *resealv1.ViolationsError
	var request *requestError
	switch {
	case errors.As(err, &violations):
		return violationsStatus(violations.Violations)
	case errors.As(err, &request):
		return detailed(codes.InvalidArgument, err.Error(), &errdetails.BadRequest{
			FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: request.field, Description: request.description}},
		})
	case errors.Is(err, errNotFound):
		return status.Error(codes.NotFound, err.Error())
	}
	var conflict interface {
		error
		CurrentRevision() int64
	}
	if errors.As(err, &conflict) {
		return detailed(codes.Aborted, err.Error(), &errdetails.ErrorInfo{
			Reason: reasonConflict, Domain: errorDomain,
			Metadata: map[string]string{"revision": strconv.FormatInt(conflict.CurrentRevision(), 10)},
		})
	}
	for _, known := range s.cfg.Codes {
		if errors.Is(err, known.Is) && known.Code != codes.OK && known.Code != codes.Unknown {
			return status.Error(known.Code, err.Error())
		}
	}
	switch {
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	}
	// What it was may be for operators of the control plane only.
	id := uuid.NewString()
	s.cfg.Logger.ErrorContext(ctx, "internal error", "method", method, "error_id", id, "error", err)
	return status.Errorf(codes.Internal, "internal error; the control plane's log has it as error_id %s", id)
}

func violationsStatus(violations []*resealv1.Violation) error {
	bad := &errdetails.BadRequest{}
	for _, violation := range violations[:min(len(violations), maxViolations)] {
		bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{
			Field: fieldOf(violation), Description: shorten(violation.GetDescription()),
		})
	}
	message := "not valid"
	if len(violations) > 0 {
		message = shorten(violations[0].Text())
	}
	switch more := len(violations) - 1; {
	case len(violations) > maxViolations:
		message += fmt.Sprintf("; and %d more, of which the first %d are listed", more, maxViolations-1)
	case more > 0:
		message += fmt.Sprintf("; and %d more", more)
	}
	return detailed(codes.InvalidArgument, message, bad)
}

// fieldOf is "Kind/name: path", or "Kind/name" for the resource as a whole.
func fieldOf(violation *resealv1.Violation) string {
	if violation.GetField() == "" {
		return violation.GetResource().Key()
	}
	return violation.GetResource().Key() + ": " + violation.GetField()
}

func shorten(text string) string {
	if len(text) <= maxDescription {
		return text
	}
	cut := maxDescription
	for cut > 0 && text[cut]&0xC0 == 0x80 { // not within a character
		cut--
	}
	return text[:cut] + "…"
}

func detailed(code codes.Code, message string, detail protoadapt.MessageV1) error {
	plain := status.New(code, message)
	if full, err := plain.WithDetails(detail); err == nil {
		return full.Err()
	}
	return plain.Err()
}
