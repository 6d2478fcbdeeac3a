package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// explain turns a call's error into one for people. io.EOF, the end of a
// stream, stays as it is.
func (c *client) explain(ctx context.Context, method string, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		c.answered.Store(true)
		return err
	}
	st := status.Convert(err)
	if violations := violationsOf(st); len(violations) > 0 {
		return &refusedError{violations: violations}
	}
	switch st.Code() {
	case codes.Canceled:
		if ctx.Err() != nil {
			return errInterrupted
		}
	case codes.Unavailable:
		return c.unavailable(st)
	case codes.DeadlineExceeded:
		if unreachable := c.dials.unreachable(c.target); unreachable != nil {
			return unreachable
		}
		return fmt.Errorf("the control plane did not answer within %s (--timeout)", c.timeout)
	case codes.Aborted:
		return conflictError(st)
	case codes.PermissionDenied:
		return c.permissionError(method, st)
	case codes.Unauthenticated:
		return fmt.Errorf("the control plane does not accept the client certificate of %s: %s", c.target, st.Message())
	case codes.NotFound:
		return &missingError{text: st.Message()}
	case codes.Unimplemented:
		return fmt.Errorf("the control plane has no %s: is its version another than resealctl's?", shortMethod(method))
	}
	return errors.New(st.Message())
}

// refusedError is the control plane's answer to resources that are not valid.
type refusedError struct{ violations []*resealv1.Violation }

// Error names every violation, one a line.
func (e *refusedError) Error() string {
	lines := make([]string, len(e.violations))
	for i, violation := range e.violations {
		lines[i] = violation.Text()
		if violation.Resource == nil {
			lines[i] = violation.Field + ": " + violation.Description
		}
	}
	return strings.Join(lines, "\n")
}

// errInterrupted is the error of a call that a signal ended.
var errInterrupted = errors.New("interrupted")

// missingError is the control plane's NOT_FOUND.
type missingError struct{ text string }

func (e *missingError) Error() string { return e.text }

func (e *missingError) Is(target error) bool { return target == errNotFound }

func (c *client) unavailable(st *status.Status) error {
	if unreachable := c.dials.unreachable(c.target); unreachable != nil {
		return unreachable
	}
	// With TLS 1.3 the server's verdict on our certificate comes after the
	// handshake.
	if _, alert, found := strings.Cut(st.Message(), "remote error: tls: "); found {
		return fmt.Errorf("the control plane does not accept the client certificate of %s: %s", c.target, strings.Trim(alert, `"`))
	}
	// What does not come from the server comes from the transport, which only
	// says so in its text.
	for _, transport := range []string{"connection error: ", "error reading ", "connection reset by peer", "broken pipe", "transport is closing"} {
		if strings.Contains(st.Message(), transport) {
			return c.lostConnection()
		}
	}
	return fmt.Errorf("the control plane can't do this now: %s", st.Message())
}

// lostConnection is the error of a connection that was there. One that never
// brought an answer most likely ended because of who we are, and the server's
// alert was lost with it.
func (c *client) lostConnection() error {
	if c.answered.Load() {
		return errors.New("lost the connection to the control plane")
	}
	return fmt.Errorf("the control plane ended the connection at once: does it accept the client certificate of %s?", c.target)
}

func conflictError(st *status.Status) error {
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.Metadata["revision"] != "" {
			return fmt.Errorf("conflict: the configuration is now at revision %s: look at what changed (resealctl history) and try again with --expected-revision %[1]s",
				info.Metadata["revision"])
		}
	}
	return fmt.Errorf("conflict: %s", st.Message())
}

func (c *client) permissionError(method string, st *status.Status) error {
	who, err := c.target.identity()
	if err != nil {
		return fmt.Errorf("not allowed: %s", st.Message())
	}
	allowed := allowedRoles(method)
	if len(allowed) == 0 || who.mayCall(method) {
		return fmt.Errorf("not allowed: %s", st.Message())
	}
	return fmt.Errorf("not allowed: %s needs role %s, and %s is for %s", shortMethod(method),
		resealv1.Label(slices.Min(allowed)), c.target, who)
}

// violationsOf reads the field violations of a status.
func violationsOf(st *status.Status) []*resealv1.Violation {
	var violations []*resealv1.Violation
	for _, detail := range st.Details() {
		bad, ok := detail.(*errdetails.BadRequest)
		if !ok {
			continue
		}
		for _, field := range bad.GetFieldViolations() {
			violations = append(violations, parseViolation(field.GetField(), field.GetDescription()))
		}
	}
	return violations
}

// parseViolation reads "Kind/name: path" or "Kind/name". Anything else is the
// path of a request's own field.
func parseViolation(field, description string) *resealv1.Violation {
	key, path, _ := strings.Cut(field, ": ")
	kind, name, isKey := strings.Cut(key, "/")
	if !isKey {
		return &resealv1.Violation{Field: field, Description: description}
	}
	return &resealv1.Violation{
		Resource:    &resealv1.ResourceRef{Kind: kind, Name: name},
		Field:       path,
		Description: description,
	}
}

// allowedRoles reads the (allow) option of a method, "/service/method".
func allowedRoles(method string) []resealv1.Role {
	name := strings.ReplaceAll(strings.TrimPrefix(method, "/"), "/", ".")
	desc, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(name))
	if err != nil {
		return nil
	}
	roles, _ := proto.GetExtension(desc.Options(), resealv1.E_Allow).([]resealv1.Role)
	return roles
}

// mayCall says whether the (allow) option of a method admits the identity. A
// higher role may do what a lower one may; edges and anonymous callers stand
// outside of that order.
func (i identity) mayCall(method string) bool {
	for _, role := range allowedRoles(method) {
		if i.role == role || role >= resealv1.Role_ROLE_VIEWER && i.role >= role {
			return true
		}
	}
	return false
}

// shortMethod is the name of a method without its package.
func shortMethod(method string) string {
	service, name, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	return service[strings.LastIndexByte(service, '.')+1:] + "." + name
}
